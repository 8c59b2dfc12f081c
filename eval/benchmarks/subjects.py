"""Names of the subjects into which benchmarks are divided on the hub."""

_MMLU = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
    econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
    high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
    high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
    human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
    medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory professional_accounting
    professional_law professional_medicine professional_psychology public_relations security_studies sociology
    us_foreign_policy virology world_religions
"""

_CEVAL = """
    accountant advanced_mathematics art_studies basic_medicine business_administration
    chinese_language_and_literature civil_servant clinical_medicine college_chemistry college_economics
    college_physics college_programming computer_architecture computer_network discrete_mathematics
    education_science electrical_engineer environmental_impact_assessment_engineer fire_engineer
    high_school_biology high_school_chemistry high_school_chinese high_school_geography high_school_history
    high_school_mathematics high_school_physics high_school_politics ideological_and_moral_cultivation law
    legal_professional logic mao_zedong_thought marxism metrology_engineer middle_school_biology
    middle_school_chemistry middle_school_geography middle_school_history middle_school_mathematics
    middle_school_physics middle_school_politics modern_chinese_history operating_system physician
    plant_protection probability_and_statistics professional_tour_guide sports_science tax_accountant
    teacher_qualification urban_and_rural_planner veterinary_medicine
"""
MMLU = tuple(_MMLU.split())
CEVAL = tuple(_CEVAL.split())
